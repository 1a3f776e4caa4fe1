"""Ray Train and Ray Tune run the method: workers, checkpoints, trials."""
