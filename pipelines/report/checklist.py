"""The items of TRIPOD+AI and CLAIM, each with what the records say about it.

TRIPOD+AI: Collins et al., BMJ 2024;385:e078378. CLAIM: Mongan et al., Radiology: AI 2020;2:e200029.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipelines.report.words import NOT_STATED

ITEMS = (
    ("title", "1", "1", "Title: the kind of model and its purpose"),
    ("background", "3a", "3", "Clinical context and role"),
    ("use", "3b", "3", "Intended use and target population"),
    ("inequalities", "3c", "", "Known inequalities between groups"),
    ("objectives", "4", "4", "Objectives and hypotheses"),
    ("design", "", "5", "Prospective or retrospective"),
    ("sources", "5a", "7", "Sources of the data"),
    ("dates", "5b", "7", "Dates of the data"),
    ("setting", "6a", "7", "Setting: number and place of centers"),
    ("eligibility", "6b", "8", "Who was eligible"),
    ("preparation", "7", "9", "Preparation of the data"),
    ("subsets", "", "10", "Selection of subsets of the data"),
    ("deidentified", "", "12", "De-identification"),
    ("outcome", "8a", "14", "Reference standard: definition"),
    ("annotators", "8b", "16", "Reference standard: who annotated"),
    ("blinding", "8c", "17", "Reference standard: blinding and tools"),
    ("agreement", "", "18", "Agreement between annotators"),
    ("predictors", "9a", "11", "Inputs of the model"),
    ("size", "10", "19", "Sample size"),
    ("missing", "11", "13", "Missing data"),
    ("partitions", "12a", "20", "How data were assigned to splits"),
    ("disjoint", "12a", "21", "Level at which the splits are disjoint"),
    ("network", "12c", "22", "The model"),
    ("software", "12c", "23", "Software libraries"),
    ("initial", "12c", "24", "Initial weights"),
    ("training", "12c", "25", "How it was trained"),
    ("selection", "12c", "26", "How the final model was chosen"),
    ("ensemble", "12c", "27", "Ensembling"),
    ("heterogeneity", "12d", "", "Differences between clusters of patients"),
    ("measures", "12e", "28", "Measures of performance"),
    ("uncertainty", "12e", "29", "Statistical uncertainty"),
    ("robustness", "", "30", "Robustness and sensitivity"),
    ("explaining", "", "31", "Methods for explanation"),
    ("external", "12a", "32", "Validation on external data"),
    ("imbalance", "13", "", "Imbalance of the classes"),
    ("fairness", "14", "", "Fairness"),
    ("output", "15", "", "Output of the model and thresholds"),
    ("ethics", "17", "", "Ethical approval"),
    ("funding", "18a", "42", "Funding"),
    ("interests", "18b", "", "Conflicts of interest"),
    ("protocol", "18c", "41", "Protocol"),
    ("registration", "18d", "40", "Registration of the study"),
    ("data_sharing", "18e", "", "Availability of the data"),
    ("code_sharing", "18f", "", "Availability of the code"),
    ("patients", "19", "", "Involvement of patients and the public"),
    ("flow", "20a", "33", "Flow of participants"),
    ("demographics", "20b", "34", "Characteristics of participants"),
    ("specification", "22", "", "Full specification of the model"),
    ("performance", "23a", "35, 36", "Performance with intervals"),
    ("failures", "23b", "37", "Analysis of failures and subgroups"),
    ("updating", "24", "", "Updating of the model"),
    ("limitations", "26", "38", "Limitations"),
    ("implications", "25, 27", "39", "Implications for practice"),
)


def filled(answers: Mapping[str, str]) -> list[dict[str, str]]:
    """Each item with its answer, `not stated` where the records have none."""
    return [
        {"item": title, "tripod_ai": tripod, "claim": claim, "answer": answers.get(key) or NOT_STATED}
        for key, tripod, claim, title in ITEMS
    ]
