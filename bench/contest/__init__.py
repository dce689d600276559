"""What is measured: the cases, and against whom."""
