"""Handing a finished model on: its card, whose licences it stands under, and the way to the hub."""
