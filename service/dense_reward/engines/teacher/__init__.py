"""A pair as a teacher: one distribution of both models, for distillation."""
