"""Train, compare and understand methods against spurious correlations in image classifiers.

The modules in the order in which data flows; each imports only from those above it:

    seeding, console, machine,
    messages, overrides, paired,
    intervals, ranks, table_formats   the hash of seeds; table rows; CPU cores; wording; hparams as users write them;
                                      statistics; tables as data, and how they are written
    metadata, manifests,
    feature_files                     CSV files; those that list a dataset's images; files of their features
    registry                          name -> class; class attributes read without importing
    lib/distributions,
    lib/supervised_contrast,
    lib/lars, lib/weight_average,
    lib/misc, lib/                    quantiles of few values; a contrastive loss; an optimizer; the mean of weights;
                                      these and other helpers at the paths that DomainBed users import
    images, augmentation,
    image_cache, input_pipelines   0  image files; how they are augmented, cached and opened
    downloading, unpacking, releases  archives from the network; into folders; what a dataset's files are
    interruption                      requests that the process save its work and end
    datasets/, mask_files          1  images, labels y, confounders c, groups g, environments e; the user's own masks
    splits, partitions, loaders,
    samples, notices               2  what is trained on; which examples share a minibatch; batches; the images that a
                                      method may look at between two stages; warnings
    backbones, networks,
    feature_maps, branches,
    attribution, masking,
    similarities, maskers          3  featurizers; a layer's maps; two on a shared trunk; heatmaps; images seen through
                                      masks; how alike two heatmaps are; networks that make masks
    stages, logistic_regression       what a method declares of its stages; a last layer that is fitted
    algorithms/, algorithms_ex2l,
    hparams_registry               4  minibatches -> update() -> step values; defaults and random draws
    explainers, subsets,
    explanation_metrics,
    feature_scores, features,
    evaluation, scores             5  where any algorithm looks; which images are explained; heatmaps -> how faithful
                                      and well placed; what a network makes of images, and how it is told apart;
                                      algorithm, split -> average, per-group and worst-group numbers; what is chosen by
    records, loggers,
    explanation_records, cards        one JSON line per checkpoint; who else is told of it; what a dataset holds
    holders, claims, run_directory,
    states, state_trees, snapshots,
    training                       6  who works in a run's directory, and what became of the run; everything that it
                                      needs to go on; the loop
    inferred_confounders              what stands for confounders that nobody annotated
    rows, model_selection          7  records -> rows of tables; the run and the step that one would have chosen
    condensing, run_index             a sweep's files -> the records that selection may take, kept in an index
    tables, *_tables, figures,
    *_figures                      8  chosen runs -> tables, images
    commands, jobs, refit,
    job_lists, status_tables, plans   sweep -> jobs; which a directory has; how they stand; what they will take
    children, fork_server, pool,
    slurm_tasks, slurm,
    command_launchers              9  processes that run jobs, on this machine and on a cluster
    saved_models, predictors          a run's model; the same for images of one's own
    report/                           a sweep as one page of HTML
    scripts/                          the verbs: parse, call, print
    api                               what notebooks call

The letters of shapes: B images in a minibatch, C channels, H x W pixels, K classes, V confounder values,
E parts of the partition (DomainBed's environments), N examples, Z pixels of a feature map.
Integer arrays: y label in [0, K), c confounder in [0, V), e environment, g = y * V + c group, i index.
Masks m: 1 on what should matter, 0 on what should not.
"""

__version__ = "0.1.0"
