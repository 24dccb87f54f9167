# The steps of `make demo-real`. A step whose result is there is skipped, and a training that was stopped resumes: the
# same command again goes through to the report. `make demo-real REAL=runs/another` begins anew.

REAL := runs/demo-real
REAL_TEACHER := teachers/smollm2-135m
REAL_TEXT := $(REAL)/text
# Fifteen of the thirty layers stay attention. Those that carry copying and the first two are among them.
REAL_LAYERS := 0 1 3 5 8 11 16 17 18 19 20 21 22 23 27
# More options for a step, such as `make demo-real REAL=runs/seed-1 REAL_OPTIONS="--seed 1"`.
REAL_OPTIONS ?=
REAL_MAKE ?=
REAL_ALIGN ?=
REAL_DISTIL ?=
REAL_EVAL ?=
REAL_START ?=

REAL_MODELS = --preset smollm2-135m --teacher_model $(REAL_TEACHER) --layers $(REAL_LAYERS) --dtype float32 \
	--local_files_only $(REAL_OPTIONS)
REAL_TRAIN = $(BIN)/python train_gpus.py $(REAL_MODELS) --teacher_placement colocated --teacher_device cpu \
	--dataset_name $(REAL_TEXT)/train.jsonl --no_dataset_streaming --seq_length 256 --batch_size 2 \
	--eval_dataset_name $(REAL_TEXT)/heldout.jsonl --eval_windows 8 --eval_interval 25 --layer_map_interval 50 \
	--max_lr 3e-4 --min_lr 1.5e-5 --warmup_steps 10 --decay_ratio 0.9 --save_interval 25 --save_total_limit 1 \
	--resume auto

$(REAL_TEACHER)/config.json: | .venv/installed-gguf
	$(BIN)/python -m presets.smollm2 $(REAL_TEACHER)

$(REAL_TEXT)/train.jsonl: | .venv/installed
	$(BIN)/python -m presets.real_text $(REAL_TEXT)

$(REAL)/students/%/conversion.json: | $(REAL_TEACHER)/config.json $(REAL_TEXT)/train.jsonl
	$(BIN)/python make_student.py $(REAL_MODELS) --init $* --output $(@D) \
		--calibration $(REAL_TEXT)/train.jsonl $(REAL_MAKE)

$(REAL)/start.json: | $(REAL)/students/closed_form/conversion.json $(REAL)/students/projections/conversion.json
	$(BIN)/python -m presets.real_start --students $(REAL)/students --teacher $(REAL_TEACHER) \
		--held_out $(REAL_TEXT)/heldout.jsonl --layers $(REAL_LAYERS) --output $@ $(REAL_START)

# Each mixer learns its attention's output.
$(REAL)/aligned: | $(REAL)/students/closed_form/conversion.json
	$(REAL_TRAIN) --stage align --student_model $(REAL)/students/closed_form --output_dir $(REAL)/align \
		--max_steps 50 $(REAL_ALIGN)
	touch $@

# The whole hybrid learns the teacher's distribution; what was copied moves at a tenth of the mixers' rate.
$(REAL)/distilled: | $(REAL)/aligned
	$(REAL_TRAIN) --student_model $(REAL)/align/latest --output_dir $(REAL)/distil \
		--ce_weight 0 --kl_weight 1 --copied_lr_factor 0.1 --max_steps 120 $(REAL_DISTIL)
	touch $@

$(REAL)/distil/eval.json: | $(REAL)/distilled
	$(BIN)/python eval_mmlu_hybrid.py $(REAL_MODELS) --student_model $(REAL)/students/closed_form \
		--ckpt $(REAL)/distil/latest --which hybrid hybrid_ft teacher --no_mmlu --resume --output $@ \
		--held_out $(REAL_TEXT)/heldout.jsonl --held_out_seq_length 256 --held_out_windows 32 \
		--retrieval --retrieval_lengths 256 --retrieval_pairs 4 16 --retrieval_questions 32 $(REAL_EVAL)

$(REAL)/report.md: | $(REAL)/start.json $(REAL)/distil/eval.json
	$(BIN)/python report.py $(REAL)/align $(REAL)/distil --output $(REAL)/report/index.html
	$(BIN)/python -m presets.real_report $(REAL) --teacher $(REAL_TEACHER)
