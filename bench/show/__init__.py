"""A result: its file, its tables and pictures, and two of them compared."""
