"""The symbols of a byte-level model: a document is a stream `(byte{1..P-1} EOP)* EOD` of them.

P, the most symbols in a patch, counts the closing EOP. EOD stands alone after the last patch. BOS may stand first.
"""

from __future__ import annotations

PAD = 256
"""Fills rows up; never predicted."""
BOS = 257
"""Begins a text; never predicted."""
EOD = 258
"""End of the document, in the place of a further patch."""
EOP = 259
"""End of a patch."""
SYMBOLS = 260
"""How many symbols there are."""
