"""From a checkpoint to a bundle, in stages: checkpoint, trace, partition, lower, pack, profile, schedule.

``pipeline.compile_model`` runs them in this order; each stage is one function that takes the record of the stage
before and gives its own. Nothing heavy is imported here.
"""
