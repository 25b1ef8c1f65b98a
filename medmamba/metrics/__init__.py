"""Scores and labels -> figures: accuracy, AUC, sensitivity, specificity, F1, intervals, yardsticks; without torch."""
