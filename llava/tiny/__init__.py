"""The bundled model, a small trained LLaVA, and the synthetic dataset and benchmarks that it is evaluated on.

    python -m llava.tiny.tower       # download and convert the vision tower (needed once)
    python -m llava.tiny.build       # write the benchmarks, or --check the bundled ones
    python -m llava.tiny.features    # encode the training images
    python -m llava.tiny.train       # train projector and language model
    python -m llava.tiny.world       # draw a contact sheet of the dataset
    python -m llava.tiny.base        # download and convert the language model of smol
    python -m llava.tiny.chat        # write text-only conversations to train it with
    python -m llava.tiny.adapter     # write what is shipped of a training run of smol
    python -m llava.tiny.measure     # measure descriptions, short answers, plain questions, perplexity

`world` draws images and asks questions, `benchmarks` writes them in official formats, `training` trains the
model. The rest of the package treats the bundled model like any other checkpoint.
"""
