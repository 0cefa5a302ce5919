"""Calibration: data -> collect -> criteria -> ridge | trained -> measure -> store; `fit` runs it.

data        text and questions -> examples
collect     examples -> features, activations and gradients of every unit
criteria    activations and gradients -> scores
ridge       sums of features and scores -> a predictor in closed form
trained     stored scores of some tokens -> the paper's predictor
predictor   the networks themselves
measure     how a predictor does on held-out tokens (damage, quantiles: tables of that)
checkpoint  the state of a pass that was interrupted
store       the calibration directory
"""
