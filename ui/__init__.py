"""The studio in a browser. It shows what lies in run folders and the library, and starts the same commands."""
