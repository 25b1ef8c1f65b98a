"""Scores and labels -> figures, their intervals and what follows from them; without torch, without reading or writing.

Everything below takes one value, made once from arrays and a task (multiclass, ordinal or multilabel)::

    predictions = checked_predictions(scores_nC, labels_nC, task, groups)   # predictions: probabilities, 0/1, names

    estimate(predictions)                         # estimates: each figure per class and macro, with its interval
    compare(predictions, others)                  # the paired difference of two models: .macro["auc"].p_above(-0.02)
    what_it_can_show(estimate(predictions))       # one sentence on the size of the sample
    rank_subgroups(predictions, columns)          # subgroups: the same by metadata column, worst first

    calibration(predictions)                      # calibration: error with interval, reliability curve
    fit_temperature(logits_nC, labels_nC, task)   # on validation; then with_temperature; log_scores gives logits
    choose_threshold(validation, 1, sensitivity=0.95)   # operating; then at_threshold(test, ...), decision_curve
    fit_sets(validation, miss=0.1)                # conformal; then measure_sets(rule, test)
    risk_curve(predictions)                       # abstaining; choose_confidence(validation, risk), energy(logits_nC)

A group (a patient) is what is independent, so each interval is clustered by group; a sample whose group is None or
empty is a group of its own. A figure that the sample does not define is None, never NaN. `figures` has the definitions,
`influence` the variances, `confidence` which interval a figure gets and why.

Older, for the step's record and for baselines: `classification`, `baselines`.
"""
