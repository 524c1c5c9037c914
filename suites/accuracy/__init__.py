"""Accuracy by the task's own metric: labelled data, a deployment's post-processing, and what COCO's evaluation says."""
