"""What can be counted without a clock: what operators, launches and executed blocks do."""
