"""Caption accuracy in two processes against one."""

import pytest
import torch

from decm_lightning.demo import CaptionProbe
from decm_lightning.even_split import split_evenly
from decm_lightning.image_writer import to_uint8
from decm_lightning.metrics import FeatureMetrics
from decm_lightning.metrics.metric import Prompts
from tests.demo.test_captions import HELD, Data, Pixels, read
from tests.parallel.pair import SIZE

pytestmark = pytest.mark.slow


def measured(batch_size: int, world: int) -> tuple[dict[str, float], dict[str, str]]:
    """Accuracies and protocol for held-out images with noise; each process sees its own part."""
    rank = 0 if world == 1 else torch.distributed.get_rank()
    data = Data()
    quality = FeatureMetrics(CaptionProbe(Pixels()))
    quality.prepare(data, read)
    held = data.reference.__getitems__(range(HELD))
    noise = torch.randn(held.x_1.shape, generator=torch.Generator().manual_seed(1))
    for rows in split_evenly(HELD, batch_size, rank, world):
        prompts = Prompts(data.condition(rows))
        quality.update(to_uint8(held.x_1[rows.start : rows.stop]), real=True, prompts=prompts)
        quality.update(to_uint8((held.x_1 + noise)[rows.start : rows.stop]), real=False, prompts=prompts)
    return quality.compute(), quality.describe()


@pytest.mark.parametrize("batch_size", [9, 1])
def test_two_processes_measure_what_one_does(pair, batch_size):
    expected = measured(100, world=1)
    assert 0 < expected[0]["caption_top1"] < expected[0]["caption_top5"] < 1
    assert all(result == expected for result in pair.run(measured, batch_size, SIZE))
