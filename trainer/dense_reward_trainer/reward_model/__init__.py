"""An explicit reward from demonstrations: pairs of a demonstration and an own answer, and a scalar head that tells them
apart.
"""
