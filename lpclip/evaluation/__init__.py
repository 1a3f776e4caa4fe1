"""Accuracy, calibration and robustness of classifiers and encoders, in numbers. Labels are read here alone."""
