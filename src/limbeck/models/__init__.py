"""Models: teachers, students, and the surgery between them."""
