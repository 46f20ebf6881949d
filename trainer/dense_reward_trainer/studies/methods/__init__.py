"""The methods that learn from demonstrations, compared with each other and with theory."""
