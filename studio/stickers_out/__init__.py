"""Stickers people can send: a clip fitted to what a platform takes, then read again and checked."""
