"""What the scripts call and the tests import."""
