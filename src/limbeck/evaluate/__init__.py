"""What was gained and what was lost: quality, cost, the verdict, and the report that shows them."""
