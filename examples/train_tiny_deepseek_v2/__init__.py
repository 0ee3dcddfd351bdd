"""Train the small DeepSeek-V2 checkpoint that is kept in ``examples/tiny-deepseek-v2``.

    python -m examples.train_tiny_deepseek_v2 --output DIR

Its files in the order of the data: ``text``, ``tokenizer``, ``batches``, ``architecture``, ``trainer``, ``run``,
``evaluation``, ``export``, ``card``.

The text is the King James Version (1611, public domain) as the Debian package ``bible-kjv-text`` has it. Get it with
``apt-get install bible-kjv``; without ``--text`` the package's program is called (``bible -f gen1:1-rev22:21``), and
``--text`` names a file that holds that program's output instead.

The model is transformers' own ``DeepseekV2ForCausalLM``; only three things are put in its way while it trains, none of
which is in the checkpoint: a faster grouped expert product (``experts``), a causal attention that is cheap on a CPU
(``attention``), and dropout on the residual branches (``hooks``). The weights that the forward pass uses are bfloat16
(so the held-out loss is the loss of the checkpoint as shipped), the optimizer's are float32.

The learning rate runs along lines between the points of ``--rates`` and on to zero at ``--steps``: a warm-up, a
plateau, a slow and then a faster fall. A run can be resumed from its work folder, also with other points and another
end, as long as the steps that were done had the same rates; so it is always the run that its command makes from the
start.
"""
