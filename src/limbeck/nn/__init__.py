"""Operators: long convolutions, filters, exact decoding, the Hyena operator. Plain torch; every device, CPU included."""
