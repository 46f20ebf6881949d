"""What a user can set: one schema a job."""
