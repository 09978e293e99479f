"""Measuring a JAM and its parents: perplexity, divergence from the parents, and what is drawn."""
