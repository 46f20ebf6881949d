"""What a user can set: a configuration class for each job."""
