"""Times and memory: what takes a clock, and says on what machine."""
