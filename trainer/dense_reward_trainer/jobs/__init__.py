"""What a user can run: a module for each job."""
