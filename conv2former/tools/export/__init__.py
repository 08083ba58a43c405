"""Export to other formats, and int8."""
