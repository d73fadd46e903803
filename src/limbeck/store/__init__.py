"""Target stores: what a teacher said about a text, kept on disk so that it can prove itself."""
