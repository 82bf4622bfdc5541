"""What an experiment will take, before anything is spent."""
