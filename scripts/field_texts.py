"""Rewrite the texts of all settings in plain English: run once, then delete this file.

The texts are docstrings below fields, in lines that other branches change as well. So they are
applied by a script after merging: python scripts/field_texts.py; python scripts/reference.py
"""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

# Class of settings (its docstring under ""), field, text.
TEXTS: dict[str, dict[str, str]] = {
    "RunConfig": {
        "": "Settings that every job has.",
        "name": "Name of the job. Run directories start with it.",
        "seed": "Seed of all random numbers.",
        "device": "Device of all networks and of the ring. auto: cuda if one is visible.",
        "dtype": "Compute dtype of the networks. auto: float16 on CUDA, bfloat16 on a CPU with "
        "bfloat16 products, otherwise float32. float16 on a CPU is refused.",
        "num_threads": "CPU threads. 0: all cores that this process may use.",
        "run_dir": "Directory of the results. auto: runs/NAME-DATE-TIME.",
    },
    "DistillConfig": {
        "more_teachers": "Further teachers. The target of an image is the mean probability of all "
        "teachers that are active and teach the image's class.",
    },
    "RingConfig": {
        "": "The ring buffer of images.",
        "capacity_images": "Number of slots, rounded up to whole blocks. A slot takes channels * "
        "height * width bytes.",
        "min_fill_images": "Images in the ring before the first training step, rounded up to "
        "whole blocks.",
        "samples_per_insert": "Reuse: views drawn per inserted image. A set on disk that fits into "
        "the ring is inserted once and then drawn until train.num_views.",
        "error_buffer": "Views by which the reuse may be ahead or behind during the run. null: "
        "samples_per_insert * min_fill_images, so that views never exceed samples_per_insert * "
        "images.",
        "order": "Order of drawing. shuffled: passes over all images. equal: passes over the less "
        "used half, so that late images catch up. uniform: independent draws. balanced: equally "
        "often by class.",
        "max_uses": "Views after which an image is no longer drawn. Only for shuffled and equal.",
        "overlap": "Generate the next block on a CUDA stream of its own while the student trains. "
        "The block that will be overwritten next is then not drawn. Not for images on disk.",
    },
    "ViewsConfig": {
        "": "Random views of the images, the same crops for teacher and student.",
        "size": "Side of a view in pixels.",
        "scale": "Range of the crop's area, as a fraction of the image's area.",
        "ratio": "Range of the crop's aspect ratio (width / height).",
        "pad": "Width of the black border in pixels that a crop may reach into.",
        "flip": "Probability of a horizontal flip.",
    },
    "EvalConfig": {
        "": "The real test set. It is reported and decides nothing.",
        "path": "Directory with idx files, class folders or WebDataset shards, or `embedded:NAME`.",
        "classes": "Text file with one class name per line, in the job's order. null: classes.txt "
        "in the directory, otherwise the sorted names of the class folders.",
        "num_points": "Number of evaluations during a run, the last one included.",
    },
    "TeacherConfig": {
        "": "A classifier trained on real images: `dmkd pretrain teacher`.",
        "mean": "Mean of the pixels, in [0, 1], that inputs are normalized with.",
        "std": "Standard deviation of the pixels that inputs are normalized with.",
        "label_smoothing": "Fraction of the target that is spread over all classes.",
    },
    "PretrainConfig": {"": "Settings that all kinds of pretraining have."},
    "PretrainDenoiserConfig": {
        "": "A class-conditional pixel DiT trained on real images: `dmkd pretrain denoiser`.",
        "patch_size": "Side of a patch in pixels. It must divide the side of the images.",
        "num_layers": "Number of transformer blocks.",
        "num_heads": "Number of attention heads.",
        "head_dim": "Width of an attention head.",
        "label_dropout": "Fraction of the examples trained with the null class, which guidance "
        "needs.",
    },
    "PretrainFewstepConfig": {
        "": "A denoiser trained to make an image in few steps: `dmkd pretrain fewstep`.",
        "denoiser": "The denoiser to start from. It is the teacher as well.",
        "sampler": "How the teacher makes its trajectories. Its guidance becomes part of the "
        "result.",
        "num_steps": "Number of steps of the result. sampler.num_steps must be a multiple.",
        "pool_images": "Trajectories kept at a time, as float16 on the device.",
        "reuse": "Passes over the pool before it is generated again.",
    },
    "DenoiserConfig": {
        "": "The diffusion model.",
        "path": "Directory in diffusers format, `embedded:NAME` for a model of the package, or "
        "`hf-hub:OWNER/NAME`.",
        "revision": "Commit of an `hf-hub:` path, 40 hexadecimal digits.",
        "prompts": "One prompt per class. For text-to-image models only.",
        "decoder": "Path of another autoencoder that decodes the latents, such as an "
        "AutoencoderTiny.",
        "class_map": "The generator's index of each class of the job. null: the job has all "
        "classes of the generator.",
        "null_class": 'Class of a UNet2DModel that stood for "no class" in its training, which '
        "guidance needs. The job has the other classes. DiTs and text-to-image models need no "
        "setting.",
    },
    "ClassifierConfig": {
        "": "A classifier: saved weights (`path`) or a new network (`arch`).",
        "path": "Directory with config.json and model.safetensors, `embedded:NAME`, or "
        "`hf-hub:OWNER/NAME` in timm's layout.",
        "revision": "Commit of an `hf-hub:` path, 40 hexadecimal digits.",
        "arch": "A small network (`lenet5`, `cifar_resnet20`, `cifar_wrn16_2`, `cifar_vgg8`, "
        "...), `torchvision:NAME`, or a timm name.",
        "model_args": "Further arguments of the timm or torchvision model.",
        "stem": "First layers of a ResNet. own: those of the architecture, for 224 pixels. conv3: "
        "a 3x3 convolution with stride 1, without pooling. conv3_pool: the same with pooling. "
        "conv3_stride2: a 3x3 convolution with stride 2, without pooling.",
    },
    "TeachingConfig": {
        "": "A teacher: saved weights (`path`) or published weights of a named model (`arch` with "
        "`pretrained`).",
        "pretrained": "Download the weights that timm or torchvision publishes for `arch`. timm's "
        "weights are pinned to the newest commit in the saved settings.",
        "class_map": "The teacher's index of each class of the job. null: the same classes in the "
        "same order.",
        "teaches": "Classes of the job whose images this teacher labels. null: all.",
        "start": "Progress of the run at which this teacher starts.",
        "stop": "Progress of the run at which this teacher stops.",
    },
    "SamplerConfig": {
        "": "How images are generated.",
        "fidelity": "Preset of num_steps, solver and guidance_scale. Lower is cheaper.",
        "num_steps": "Denoising steps per image.",
        "solver": "Solver of a step. auto: that of the model's own scheduler.",
        "guidance_scale": "Scale of classifier-free guidance. 1: no guidance, at half the cost.",
        "class_guidance": "Guidance scale of single classes or ranges of classes, for example "
        "{3: 1, 10-19: 2.5}. All images then cost as much as guided ones.",
        "guidance_interval": "Guidance is applied between these fractions of the steps. A step "
        "outside costs half.",
        "guidance_channels": "Guide only the first channels (3 in the original DiT code). null: "
        "all channels.",
        "attention": "Attention of DiTs. auto: by capability (xFormers on CUDA where possible, "
        "otherwise PyTorch's; short sequences on a CPU use the package's own).",
        "micro_batch_images": "Images denoised together. It is one of the things that fix the bits "
        "of an image.",
        "compile": "Compile the denoiser with torch.compile. auto: on CUDA, where Triton is "
        "present.",
        "phases": "Other steps and guidance later in the run. A phase ends where the next one "
        "starts.",
    },
    "PhaseConfig": {
        "": "Sampler settings from some point of the run on.",
        "start": "Progress of the run at which the phase starts.",
        "num_steps": "Denoising steps per image in this phase.",
        "guidance_scale": "Guidance scale in this phase, for the classes that class_guidance does "
        "not name.",
    },
    "SourceConfig": {
        "": "Images on disk in place of a denoiser: shards of `dmkd generate`, or single files.",
        "path": "Directory of the images.",
        "kind": "Layout. shards: made by `dmkd generate`. imagefolder: class subfolders. paper: "
        "files named class_X_seed_Y_num_Z.png, as in the sets released with DM-KD. auto: by the "
        "content of the directory.",
        "image_size": "Resize to this many pixels, short side first, and crop to the center. "
        "null: as stored.",
        "block_images": "Images read together: the ring's block.",
        "follow": "Use new shards as they appear, while they are still being made.",
        "wait_s": "Seconds without a new shard after which a following run stops.",
    },
    "LossConfig": {
        "": "The loss: alpha * T^2 * KL(softmax(teacher / T) || softmax(student / T)) + (1 - "
        "alpha) * CE(student, class), mean over the batch.",
        "temperature": "Softmax temperature T.",
        "alpha": "Weight of the teacher's term. The cross-entropy with the class of the image has "
        "weight 1 - alpha. 1, as in the paper: classes are not used.",
    },
    "MixConfig": {
        "": "Mixing of views, the same for student and teachers. With both methods, each is used "
        "for half of the steps on average.",
        "mixup_alpha": "Mixup: whole views, with a weight from Beta(alpha, alpha), one per "
        "batch. 0: off.",
        "cutmix_alpha": "CutMix: a square of another view, with an area from Beta(alpha, alpha). "
        "0: off.",
    },
    "OptimConfig": {
        "": "Optimizer and learning rate: linear warm-up, then a cosine to zero, or milestones.",
        "name": "Optimizer.",
        "lr": "Peak learning rate.",
        "momentum": "Momentum of SGD, or beta1 of AdamW.",
        "nesterov": "Nesterov momentum for SGD. The paper uses plain momentum.",
        "weight_decay": "Weight decay, decoupled for AdamW. Biases and normalization are never "
        "decayed; the paper decays them too.",
        "warmup": "Fraction of the steps with a rising learning rate.",
        "milestones": "Fractions of the steps at which the learning rate is multiplied by `decay`. "
        "Empty: a cosine to zero.",
        "decay": "Factor at each milestone.",
        "ema_decay": "Decay per step of the weight EMA, which is evaluated and saved. 0: off.",
        "max_grad_norm": "Largest norm of the gradient. Larger gradients are scaled down. 0: off.",
    },
    "TrainConfig": {
        "": "Length and intervals of the training.",
        "batch_size": "Views per optimizer step.",
        "accumulate": "Number of equal micro-batches that pass through the networks one after the "
        "other, to save memory. Batch normalization sees a micro-batch at a time.",
        "num_views": "Views in the whole run.",
        "compile": "Compile the trained network and its teacher with torch.compile. auto: on CUDA, "
        "where Triton is present.",
        "max_skipped_steps": "A step whose loss or gradient is not finite changes nothing. This "
        "many in a row end the run at the next log line. The default is more than the 16 steps by "
        "which float16's loss scale falls from 65,536 to 1.",
        "checkpoint_every_s": "Seconds between checkpoints. One is always written at the end and "
        "after an interruption.",
        "log_every_steps": "Optimizer steps between log lines. Only a log line waits for the "
        "device.",
    },
}


def rewrite(text: str) -> str:
    """Return a module's source with new docstrings below its fields."""
    lines = text.splitlines()
    edits: list[tuple[int, int, str, str]] = []
    for node in ast.parse(text).body:
        if not isinstance(node, ast.ClassDef) or node.name not in TEXTS:
            continue
        new = TEXTS[node.name]
        if "" in new and ast.get_docstring(node):
            old = node.body[0]
            edits.append((old.lineno - 1, old.end_lineno or 0, "    ", new[""]))
        for place, field in enumerate(node.body):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            if field.target.id in new:
                end = field.end_lineno or 0
                below = node.body[place + 1] if place + 1 < len(node.body) else None
                is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                stop = (below.end_lineno or 0) if is_text and below else end
                edits.append((end, stop, "    ", new[field.target.id]))
    for start, stop, indent, words in sorted(edits, reverse=True):
        wrapped = textwrap.wrap(f'"""{words}"""', 96, break_long_words=False,
                                break_on_hyphens=False)  # fmt: skip
        lines[start:stop] = [indent + line for line in wrapped]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for path in (Path(__file__).parent.parent / "dmkd_fast").rglob("*.py"):
        before = path.read_text(encoding="utf-8")
        if any(f"class {name}(" in before for name in TEXTS):
            path.write_text(rewrite(before), encoding="utf-8")
