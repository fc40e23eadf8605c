"""Drift monitoring: what models see and say now, against what they saw and said in training."""
