"""What a user can run: one file a job."""
