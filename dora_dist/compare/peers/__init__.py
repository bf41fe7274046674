"""Methods of PEFT, trained on the data, steps and schedule of a run of this project."""
