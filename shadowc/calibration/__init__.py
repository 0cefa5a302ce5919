"""Calibration: data -> collect -> criteria -> predictor -> fit -> store."""
