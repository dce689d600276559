"""Recipes: real data, training, figures, and the command line."""
