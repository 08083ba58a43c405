"""Prediction, its explanation, and receptive fields."""
