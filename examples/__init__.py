"""What can be done with the library, each in a file that runs by itself."""
