"""What classifiers and encoders are worth, in numbers. Labels are read here alone."""
