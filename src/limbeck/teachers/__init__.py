"""Teachers of every kind behind one interface: given a batch, what the teacher says about it."""
