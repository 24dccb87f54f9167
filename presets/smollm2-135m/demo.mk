# The steps of `make demo-real`. A step whose result is there is skipped, and a training that was stopped resumes: the
# same command again goes through to the report. `make demo-real REAL=runs/another` begins anew.

REAL := runs/demo-real
REAL_TEACHER := teachers/smollm2-135m
REAL_TEXT := $(REAL)/text
# More options for a step, such as `make demo-real REAL=runs/seed-1 REAL_ALIGN="--seed 1" REAL_DISTIL="--seed 1"`.
REAL_MAKE ?=
REAL_START ?=
REAL_ALIGN ?=
REAL_DISTIL ?=
REAL_EVAL ?=

# The preset has the rest: which layers stay the teacher's, windows, batches, learning rates.
REAL_MODELS := --preset smollm2-135m --teacher_model $(REAL_TEACHER) --local_files_only
REAL_TRAIN := $(BIN)/python train_gpus.py $(REAL_MODELS) --teacher_placement colocated --resume auto \
	--dataset_name $(REAL_TEXT)/train.jsonl --no_dataset_streaming \
	--eval_dataset_name $(REAL_TEXT)/heldout.jsonl --eval_windows 4 --eval_interval 20 \
	--warmup_steps 3 --decay_ratio 0.75 --layer_map_interval 20 --save_interval 20 --save_total_limit 1

$(REAL_TEACHER)/config.json: | .venv/installed-gguf
	$(BIN)/python -m presets.smollm2 $(REAL_TEACHER)

$(REAL_TEXT)/train.jsonl: | .venv/installed
	$(BIN)/python -m presets.real_text $(REAL_TEXT)

# Two students: the one to train, and one whose mixers have attention's projections alone, for comparison.
# Nothing of the latter is fitted.
$(REAL)/students/projections/conversion.json: REAL_TOKENS := --calibration_tokens 256 --held_out_tokens 256
$(REAL)/students/%/conversion.json: | $(REAL_TEACHER)/config.json $(REAL_TEXT)/train.jsonl
	$(BIN)/python make_student.py $(REAL_MODELS) --init $* --output $(@D) \
		--calibration $(REAL_TEXT)/train.jsonl $(REAL_MAKE) $(REAL_TOKENS)

$(REAL)/start.json: | $(REAL)/students/closed_form/conversion.json $(REAL)/students/projections/conversion.json
	$(BIN)/python -m presets.real_start --students $(REAL)/students --teacher $(REAL_TEACHER) \
		--held_out $(REAL_TEXT)/heldout.jsonl --output $@ $(REAL_START)

# Each mixer learns its attention's output.
$(REAL)/aligned: | $(REAL)/students/closed_form/conversion.json
	$(REAL_TRAIN) --stage align --student_model $(REAL)/students/closed_form --output_dir $(REAL)/align \
		--max_steps 40 $(REAL_ALIGN)
	touch $@

# The hybrid learns the teacher's distribution. In so few steps the rate of the alignment would raise the KL. What was
# copied moves at a tenth of the mixers' rate.
$(REAL)/distilled: | $(REAL)/aligned
	$(REAL_TRAIN) --student_model $(REAL)/align/latest --output_dir $(REAL)/distil \
		--max_steps 12 --max_lr 0.00005 $(REAL_DISTIL)
	touch $@

$(REAL)/distil/eval.json: | $(REAL)/distilled
	$(BIN)/python eval_mmlu_hybrid.py $(REAL_MODELS) --student_model $(REAL)/students/closed_form \
		--ckpt $(REAL)/distil/latest --which hybrid hybrid_ft teacher --no_mmlu --resume --output $@ \
		--held_out $(REAL_TEXT)/heldout.jsonl --held_out_seq_length 256 --held_out_windows 12 \
		--retrieval --retrieval_lengths 256 --retrieval_pairs 8 --retrieval_questions 16 $(REAL_EVAL)

$(REAL)/report.md: | $(REAL)/start.json $(REAL)/distil/eval.json
	$(BIN)/python report.py $(REAL)/align $(REAL)/distil --output $(REAL)/report/index.html
	$(BIN)/python -m presets.real_report $(REAL) --teacher $(REAL_TEACHER)
