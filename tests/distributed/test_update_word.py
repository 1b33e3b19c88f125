from ksuit_runner.distributed.update_word import UpdateWord


def test_a_word_is_summed_up_over_the_ranks():
    words = [UpdateWord(said=1.0, numbers=[3.0, 0.5]), UpdateWord(said=1.0, interrupted=1.0, numbers=[4.0, 0.25])]
    sums = [sum(values) for values in zip(*(word.encode() for word in words), strict=True)]
    for word in words:
        word.take(sums)
        assert word == UpdateWord(said=2.0, interrupted=1.0, numbers=[7.0, 0.75])
