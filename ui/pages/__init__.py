"""The pages. A file here that defines `PAGE` is a page; nothing else needs to know of it."""
