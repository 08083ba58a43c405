"""Studies that end in a page of docs. Nothing in the package imports them."""
