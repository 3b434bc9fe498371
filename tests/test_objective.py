"""Noising, targets and weights against diffusers' schedulers and against their definitions."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from studio.objective import Diffusion, FlowMatching

CLEAN = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(1))
TIMES = torch.tensor([0, 10, 500, 900, 999])


def ddpm(prediction_type, zero_snr=False):
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
    )
    return scheduler, Diffusion(scheduler.alphas_cumprod, prediction_type)


def test_noising_equals_the_schedulers():
    scheduler, objective = ddpm("epsilon")
    torch.testing.assert_close(objective.noised(CLEAN, NOISE, TIMES), scheduler.add_noise(CLEAN, NOISE, TIMES))


def test_velocity_equals_the_schedulers():
    scheduler, objective = ddpm("v_prediction")
    torch.testing.assert_close(objective.target(CLEAN, NOISE, TIMES), scheduler.get_velocity(CLEAN, NOISE, TIMES))


def test_flow_noising_equals_the_schedulers():
    scheduler = FlowMatchEulerDiscreteScheduler()
    index = [0, 100, 500, 900, 990]
    sigmas = scheduler.sigmas[index]
    ours = FlowMatching().noised(CLEAN, NOISE, sigmas)
    torch.testing.assert_close(ours, scheduler.scale_noise(CLEAN, scheduler.timesteps[index], NOISE))


def data_error(objective, prediction, noisy, times):
    """The error in x_0 that a prediction implies, from the definition of the process alone."""
    if isinstance(objective, FlowMatching):
        t = times.view(-1, 1, 1, 1)
        return noisy - t * prediction - CLEAN
    a2 = objective.alphas_cumprod[times].double().view(-1, 1, 1, 1)
    a, s = a2.sqrt(), (1 - a2).sqrt()
    kinds = {
        "epsilon": lambda: (noisy - s * prediction) / a,
        "v_prediction": lambda: a * noisy - s * prediction,
        "sample": lambda: prediction,
    }
    return kinds[objective.prediction_type]() - CLEAN


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_min_snr_weights_the_error_in_the_data_by_the_clamped_snr(kind):
    gamma = 5.0
    if kind == "flow":
        objective, times = FlowMatching(), torch.tensor([0.1, 0.3, 0.5, 0.7, 0.95], dtype=torch.float64)
        snr = ((1 - times) / times) ** 2
    else:
        objective, times = ddpm(kind)[1], torch.tensor([5, 100, 400, 700, 950])
        a2 = objective.alphas_cumprod.double()[times]
        snr = a2 / (1 - a2)
    clean, noise = CLEAN.double(), NOISE.double()
    noisy, target = objective.noised(clean, noise, times), objective.target(clean, noise, times)
    prediction = target + 0.1 * torch.randn(
        target.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    ours = objective.min_snr_weight(times, gamma).double() * (prediction - target).square().mean((1, 2, 3))
    wanted = snr.clamp(max=gamma) * data_error(objective, prediction, noisy, times).square().mean((1, 2, 3))
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-8)


def test_a_schedule_that_ends_in_pure_noise_stays_finite():
    _, objective = ddpm("v_prediction", zero_snr=True)
    assert objective.snr(torch.tensor([999])).item() == 0.0
    assert torch.isfinite(objective.min_snr_weight(TIMES, 5.0)).all()
    assert torch.isfinite(objective.target(CLEAN, NOISE, TIMES)).all()


def test_times_are_drawn_over_the_whole_process_from_the_generator_alone():
    for objective in (ddpm("epsilon")[1], FlowMatching(shift=3.0)):
        draws = [objective.draw_time(torch.Generator().manual_seed(i)).item() for i in range(300)]
        again = [objective.draw_time(torch.Generator().manual_seed(i)).item() for i in range(300)]
        top = 1000 if isinstance(objective, Diffusion) else 1.0
        assert draws == again
        assert 0 <= min(draws) < 0.25 * top
        assert 0.75 * top < max(draws) <= top


def test_a_shift_moves_times_towards_noise_as_equation_23_says():
    def drawn(objective, shift):
        return [float(objective.draw_time(torch.Generator().manual_seed(i), shift)) for i in range(300)]

    diffusion = ddpm("v_prediction")[1]
    plain = [int(torch.randint(1000, (), generator=torch.Generator().manual_seed(i))) for i in range(300)]
    assert drawn(diffusion, 1.0) == plain
    assert drawn(diffusion, 4.0) == [int(1000 * 4 * u / (1 + 3 * u)) for u in ((t + 0.5) / 1000 for t in plain)]
    assert drawn(FlowMatching(shift=2.0), 1.5) == drawn(FlowMatching(), 3.0)
