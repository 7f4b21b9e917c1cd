"""Train, compare and understand methods against spurious correlations in image classifiers.

The modules in the order in which data flows; each imports only from those above it:

    seeding, console, machine,
    overrides                         the hash of seeds; table rows; CPU cores; hparams as users write them
    registry                          name -> class; class attributes read without importing
    lib/                              helpers at the paths that DomainBed users import
    datasets/                      1  images, labels y, confounders c, groups g, environments e
    partitions, loaders            2  which examples share a minibatch; minibatches and evaluation batches
    networks, attribution, similarities   3  featurizers; Grad-CAM; two maps -> one score per image
    algorithms/, algorithms_ex2l,
    hparams_registry               4  minibatches -> update() -> step values; defaults and random draws
    evaluation                     5  algorithm, split -> average, per-group and worst-group accuracy
    records, run_directory,
    training                       6  one JSON line per checkpoint; a run's directory; the loop
    rows, model_selection          7  records -> rows of tables; the run and the step that one would have chosen
    tables                         8  chosen runs -> text
    jobs, command_launchers        9  sweep -> jobs; jobs -> machines
    scripts/                          the verbs: parse, call, print

The letters of shapes: B images in a minibatch, C channels, H x W pixels, K classes, V confounder values,
E parts of the partition (DomainBed's environments), N examples, Z pixels of a feature map.
Integer arrays: y label in [0, K), c confounder in [0, V), e environment, g = y * V + c group, i index.
"""

__version__ = "0.1.0"
