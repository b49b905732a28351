"""Predict a step on clusters, and hold the prediction against processes of this machine."""
