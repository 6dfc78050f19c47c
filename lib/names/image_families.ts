/**
 * Image and video models by their tensors' names: those of their own code, which ComfyUI-GGUF,
 * stable-diffusion.cpp and diffusers' `from_single_file` read, and those of diffusers' folders, which become
 * the former. A family is an entry here; whatever a model computes is not looked at.
 *
 * A table of names has a line for each module, `OWN = DIFFUSERS`, whose `.weight` and `.bias` go along; `==`
 * is for a whole tensor. `*` is a number. Of `{a,b}` rows follow one another in one tensor, `~` has its
 * halves swapped, and `~?` only where it has twice as many rows as columns. `[OWN < DIFFUSERS]` is in front
 * of the names behind it.
 */

/** A family of image models. */
export interface ImageFamily {
  readonly name: string;
  /** `general.architecture`, as ComfyUI-GGUF knows it. */
  readonly architecture: string;
  /** Tensors of its own names, by which it is told: all of one of the lists. */
  readonly own: readonly (readonly string[])[];
  /** Tensors of diffusers' names, by which it is told; none where these are the own ones. */
  readonly diffusers: readonly (readonly string[])[];
  readonly names: string;
  /** Names that are the same in both. */
  readonly same?: RegExp;
  /** Own names of what the readers' tools never quantize. */
  readonly kept: RegExp;
}

/** What FLUX and the models built like it have outside their blocks. */
const FLUX_IN =
  /(?:^|\.)(?:txt_in|img_in|time_in|vector_in|guidance_in|final_layer|distilled_guidance_layer)\./;

/** Every family; the first whose tensors are there counts. */
export const IMAGE_FAMILIES: readonly ImageFamily[] = [
  {
    name: "FLUX.1, FLUX.2 and Chroma",
    architecture: "flux",
    own: [["double_blocks.0.img_attn.proj.weight"]],
    diffusers: [
      [
        "single_transformer_blocks.0.attn.to_q.weight",
        "transformer_blocks.0.attn.norm_added_q.weight",
        "x_embedder.weight",
      ],
      ["double_stream_modulation_img.linear.weight"],
    ],
    names: `
      img_in = x_embedder
      txt_in = context_embedder
      time_in.in_layer = time_text_embed.timestep_embedder.linear_1
      time_in.out_layer = time_text_embed.timestep_embedder.linear_2
      vector_in.in_layer = time_text_embed.text_embedder.linear_1
      vector_in.out_layer = time_text_embed.text_embedder.linear_2
      guidance_in.in_layer = time_text_embed.guidance_embedder.linear_1
      guidance_in.out_layer = time_text_embed.guidance_embedder.linear_2
      time_in.in_layer = time_guidance_embed.timestep_embedder.linear_1
      time_in.out_layer = time_guidance_embed.timestep_embedder.linear_2
      guidance_in.in_layer = time_guidance_embed.guidance_embedder.linear_1
      guidance_in.out_layer = time_guidance_embed.guidance_embedder.linear_2
      double_stream_modulation_img.lin = double_stream_modulation_img.linear
      double_stream_modulation_txt.lin = double_stream_modulation_txt.linear
      single_stream_modulation.lin = single_stream_modulation.linear
      distilled_guidance_layer.in_proj = distilled_guidance_layer.in_proj
      distilled_guidance_layer.out_proj = distilled_guidance_layer.out_proj
      distilled_guidance_layer.layers.*.in_layer = distilled_guidance_layer.layers.*.linear_1
      distilled_guidance_layer.layers.*.out_layer = distilled_guidance_layer.layers.*.linear_2
      distilled_guidance_layer.norms.*.scale == distilled_guidance_layer.norms.*.weight
      final_layer.linear = proj_out
      final_layer.adaLN_modulation.1 = ~norm_out.linear
      [double_blocks.* < transformer_blocks.*]
      img_mod.lin = norm1.linear
      txt_mod.lin = norm1_context.linear
      img_attn.qkv = attn.{to_q,to_k,to_v}
      txt_attn.qkv = attn.{add_q_proj,add_k_proj,add_v_proj}
      img_attn.norm.query_norm.scale == attn.norm_q.weight
      img_attn.norm.key_norm.scale == attn.norm_k.weight
      txt_attn.norm.query_norm.scale == attn.norm_added_q.weight
      txt_attn.norm.key_norm.scale == attn.norm_added_k.weight
      img_attn.proj = attn.to_out.0
      txt_attn.proj = attn.to_add_out
      img_mlp.0 = ff.net.0.proj
      img_mlp.2 = ff.net.2
      txt_mlp.0 = ff_context.net.0.proj
      txt_mlp.2 = ff_context.net.2
      img_mlp.0 = ff.linear_in
      img_mlp.2 = ff.linear_out
      txt_mlp.0 = ff_context.linear_in
      txt_mlp.2 = ff_context.linear_out
      [single_blocks.* < single_transformer_blocks.*]
      modulation.lin = norm.linear
      linear1 = {attn.to_q,attn.to_k,attn.to_v,proj_mlp}
      linear1 = attn.to_qkv_mlp_proj
      linear2 = proj_out
      linear2 = attn.to_out
      norm.query_norm.scale == attn.norm_q.weight
      norm.key_norm.scale == attn.norm_k.weight`,
    kept: FLUX_IN,
  },
  {
    name: "Stable Diffusion 3",
    architecture: "sd3",
    own: [["joint_blocks.0.x_block.attn.qkv.weight"]],
    diffusers: [[
      "transformer_blocks.0.attn.add_q_proj.weight",
      "pos_embed.proj.weight",
      "context_embedder.weight",
    ]],
    names: `
      pos_embed == pos_embed.pos_embed
      x_embedder.proj = pos_embed.proj
      t_embedder.mlp.0 = time_text_embed.timestep_embedder.linear_1
      t_embedder.mlp.2 = time_text_embed.timestep_embedder.linear_2
      y_embedder.mlp.0 = time_text_embed.text_embedder.linear_1
      y_embedder.mlp.2 = time_text_embed.text_embedder.linear_2
      final_layer.linear = proj_out
      final_layer.adaLN_modulation.1 = ~norm_out.linear
      context_embedder = context_embedder
      [joint_blocks.*.x_block < transformer_blocks.*]
      attn.qkv = attn.{to_q,to_k,to_v}
      attn.ln_q = attn.norm_q
      attn.ln_k = attn.norm_k
      attn.proj = attn.to_out.0
      attn2.qkv = attn2.{to_q,to_k,to_v}
      attn2.ln_q = attn2.norm_q
      attn2.ln_k = attn2.norm_k
      attn2.proj = attn2.to_out.0
      adaLN_modulation.1 = norm1.linear
      mlp.fc1 = ff.net.0.proj
      mlp.fc2 = ff.net.2
      [joint_blocks.*.context_block < transformer_blocks.*]
      attn.qkv = attn.{add_q_proj,add_k_proj,add_v_proj}
      attn.ln_q = attn.norm_added_q
      attn.ln_k = attn.norm_added_k
      attn.proj = attn.to_add_out
      adaLN_modulation.1 = ~?norm1_context.linear
      mlp.fc1 = ff_context.net.0.proj
      mlp.fc2 = ff_context.net.2`,
    kept: /(?:^|\.)(?:final_layer|context_embedder|[txy]_embedder)\.|^pos_embed$/,
  },
  {
    name: "Qwen-Image",
    architecture: "qwen_image",
    own: [["transformer_blocks.0.img_mod.1.weight", "transformer_blocks.0.attn.add_q_proj.weight"]],
    diffusers: [],
    names: "",
    kept: /^(?:img_in|txt_in|txt_norm|time_text_embed|norm_out|proj_out)\./,
  },
  {
    name: "Wan",
    architecture: "wan",
    own: [["blocks.0.self_attn.norm_q.weight", "text_embedding.2.weight", "head.modulation"]],
    diffusers: [[
      "blocks.0.attn1.norm_q.weight",
      "condition_embedder.text_embedder.linear_2.weight",
      "scale_shift_table",
    ]],
    names: `
      time_embedding.0 = condition_embedder.time_embedder.linear_1
      time_embedding.2 = condition_embedder.time_embedder.linear_2
      text_embedding.0 = condition_embedder.text_embedder.linear_1
      text_embedding.2 = condition_embedder.text_embedder.linear_2
      time_projection.1 = condition_embedder.time_proj
      img_emb.proj.0 = condition_embedder.image_embedder.norm1
      img_emb.proj.1 = condition_embedder.image_embedder.ff.net.0.proj
      img_emb.proj.3 = condition_embedder.image_embedder.ff.net.2
      img_emb.proj.4 = condition_embedder.image_embedder.norm2
      img_emb.emb_pos == condition_embedder.image_embedder.pos_embed
      head.modulation == scale_shift_table
      head.head = proj_out
      ${
      ["blocks", "vace_blocks"].map((blocks) => `
      [${blocks}.* < ${blocks}.*]
      before_proj = proj_in
      after_proj = proj_out
      modulation == scale_shift_table
      self_attn.q = attn1.to_q
      self_attn.k = attn1.to_k
      self_attn.v = attn1.to_v
      self_attn.o = attn1.to_out.0
      self_attn.norm_q = attn1.norm_q
      self_attn.norm_k = attn1.norm_k
      cross_attn.q = attn2.to_q
      cross_attn.k = attn2.to_k
      cross_attn.v = attn2.to_v
      cross_attn.o = attn2.to_out.0
      cross_attn.norm_q = attn2.norm_q
      cross_attn.norm_k = attn2.norm_k
      cross_attn.k_img = attn2.add_k_proj
      cross_attn.v_img = attn2.add_v_proj
      cross_attn.norm_k_img = attn2.norm_added_k
      norm3 = norm2
      ffn.0 = ffn.net.0.proj
      ffn.2 = ffn.net.2`).join("")
    }`,
    same: /^(?:vace_)?patch_embedding\./,
    kept:
      /(?:^|\.)modulation$|^(?:(?:vace_)?patch_embedding|text_embedding|time_projection|time_embedding|img_emb|head)\./,
  },
  {
    name: "Lumina 2 and Z-Image",
    architecture: "lumina2",
    own: [["cap_embedder.1.weight", "context_refiner.0.attention.qkv.weight"]],
    diffusers: [
      ["all_x_embedder.2-1.weight", "context_refiner.0.attention.to_q.weight"],
      ["time_caption_embed.caption_embedder.1.weight", "context_refiner.0.attn.to_q.weight"],
    ],
    names: `
      x_embedder = all_x_embedder.2-1
      final_layer.linear = all_final_layer.2-1.linear
      final_layer.adaLN_modulation.1 = all_final_layer.2-1.adaLN_modulation.1
      x_embedder = x_embedder
      cap_embedder.* = time_caption_embed.caption_embedder.*
      t_embedder.mlp.0 = time_caption_embed.timestep_embedder.linear_1
      t_embedder.mlp.2 = time_caption_embed.timestep_embedder.linear_2
      final_layer.adaLN_modulation.1 = norm_out.linear_1
      final_layer.linear = norm_out.linear_2
      [context_refiner.* < context_refiner.*]
      attention_norm1 = norm1
      ${
      ["context_refiner", "noise_refiner", "layers"].map((blocks) => `
      [${blocks}.* < ${blocks}.*]
      attention.qkv = attention.{to_q,to_k,to_v}
      attention.q_norm = attention.norm_q
      attention.k_norm = attention.norm_k
      attention.out = attention.to_out.0
      attention.qkv = attn.{to_q,to_k,to_v}
      attention.q_norm = attn.norm_q
      attention.k_norm = attn.norm_k
      attention.out = attn.to_out.0
      feed_forward.w1 = feed_forward.linear_1
      feed_forward.w2 = feed_forward.linear_2
      feed_forward.w3 = feed_forward.linear_3
      adaLN_modulation.1 = norm1.linear
      attention_norm1 = norm1.norm
      attention_norm2 = norm2`).join("")
    }`,
    same:
      /^(?:[xt]|cap)_embedder\.|_pad_token$|\.(?:feed_forward\.w\d|attention_norm\d|ffn_norm\d|adaLN_modulation\.\d)\.(?:weight|bias)$/,
    kept: /^(?:(?:[tx]|cap)_embedder|final_layer|context_refiner|noise_refiner)\.|_pad_token$/,
  },
  {
    name: "LTX-Video",
    architecture: "ltxv",
    own: [["patchify_proj.weight", "adaln_single.emb.timestep_embedder.linear_2.weight"]],
    diffusers: [["proj_in.weight", "time_embed.emb.timestep_embedder.linear_2.weight", "scale_shift_table"]],
    names: `
      patchify_proj = proj_in
      adaln_single.linear = time_embed.linear
      adaln_single.emb.timestep_embedder.linear_* = time_embed.emb.timestep_embedder.linear_*
      [transformer_blocks.*.attn1 < transformer_blocks.*.attn1]
      q_norm = norm_q
      k_norm = norm_k
      [transformer_blocks.*.attn2 < transformer_blocks.*.attn2]
      q_norm = norm_q
      k_norm = norm_k`,
    same:
      /^(?:caption_projection|proj_out)\.|(?:^|\.)scale_shift_table$|\.(?:to_(?:q|k|v|out\.0)|net\.(?:0\.proj|2))\./,
    kept: /^(?:adaln_single|caption_projection|patchify_proj|proj_out)\.|scale_shift_table/,
  },
  {
    name: "HunyuanVideo",
    architecture: "hyvid",
    own: [[
      "double_blocks.0.img_attn_proj.weight",
      "txt_in.individual_token_refiner.blocks.0.self_attn_qkv.weight",
    ]],
    diffusers: [["context_embedder.token_refiner.refiner_blocks.0.attn.to_q.weight"]],
    names: `
      img_in.proj = x_embedder.proj
      time_in.mlp.0 = time_text_embed.timestep_embedder.linear_1
      time_in.mlp.2 = time_text_embed.timestep_embedder.linear_2
      vector_in.in_layer = time_text_embed.text_embedder.linear_1
      vector_in.out_layer = time_text_embed.text_embedder.linear_2
      guidance_in.mlp.0 = time_text_embed.guidance_embedder.linear_1
      guidance_in.mlp.2 = time_text_embed.guidance_embedder.linear_2
      txt_in.input_embedder = context_embedder.proj_in
      txt_in.t_embedder.mlp.0 = context_embedder.time_text_embed.timestep_embedder.linear_1
      txt_in.t_embedder.mlp.2 = context_embedder.time_text_embed.timestep_embedder.linear_2
      txt_in.c_embedder.linear_* = context_embedder.time_text_embed.text_embedder.linear_*
      final_layer.linear = proj_out
      final_layer.adaLN_modulation.1 = ~norm_out.linear
      [txt_in.individual_token_refiner.blocks.* < context_embedder.token_refiner.refiner_blocks.*]
      norm1 = norm1
      norm2 = norm2
      self_attn_qkv = attn.{to_q,to_k,to_v}
      self_attn_proj = attn.to_out.0
      mlp.fc1 = ff.net.0.proj
      mlp.fc2 = ff.net.2
      adaLN_modulation.1 = norm_out.linear
      [double_blocks.* < transformer_blocks.*]
      img_mod.linear = norm1.linear
      txt_mod.linear = norm1_context.linear
      img_attn_qkv = attn.{to_q,to_k,to_v}
      txt_attn_qkv = attn.{add_q_proj,add_k_proj,add_v_proj}
      img_attn_q_norm = attn.norm_q
      img_attn_k_norm = attn.norm_k
      txt_attn_q_norm = attn.norm_added_q
      txt_attn_k_norm = attn.norm_added_k
      img_attn_proj = attn.to_out.0
      txt_attn_proj = attn.to_add_out
      img_mlp.fc1 = ff.net.0.proj
      img_mlp.fc2 = ff.net.2
      txt_mlp.fc1 = ff_context.net.0.proj
      txt_mlp.fc2 = ff_context.net.2
      [single_blocks.* < single_transformer_blocks.*]
      modulation.linear = norm.linear
      linear1 = {attn.to_q,attn.to_k,attn.to_v,proj_mlp}
      linear2 = proj_out
      q_norm = attn.norm_q
      k_norm = attn.norm_k`,
    kept: FLUX_IN,
  },
  {
    name: "AuraFlow",
    architecture: "aura",
    own: [["double_layers.0.modX.1.weight"], ["single_layers.0.modCX.1.weight"]],
    diffusers: [["joint_transformer_blocks.0.ff_context.out_projection.weight"]],
    names: `
      t_embedder.mlp.0 = time_step_proj.linear_1
      t_embedder.mlp.2 = time_step_proj.linear_2
      cond_seq_linear = context_embedder
      init_x_linear = pos_embed.proj
      positional_encoding == pos_embed.pos_embed
      register_tokens == register_tokens
      modF.1 = ~norm_out.linear
      final_linear = proj_out
      [double_layers.* < joint_transformer_blocks.*]
      modX.1 = norm1.linear
      modC.1 = norm1_context.linear
      attn.w2q = attn.to_q
      attn.w2k = attn.to_k
      attn.w2v = attn.to_v
      attn.w2o = attn.to_out.0
      attn.w1q = attn.add_q_proj
      attn.w1k = attn.add_k_proj
      attn.w1v = attn.add_v_proj
      attn.w1o = attn.to_add_out
      mlpX.c_fc* = ff.linear_*
      mlpX.c_proj = ff.out_projection
      mlpC.c_fc* = ff_context.linear_*
      mlpC.c_proj = ff_context.out_projection
      [single_layers.* < single_transformer_blocks.*]
      modCX.1 = norm1.linear
      attn.w1q = attn.to_q
      attn.w1k = attn.to_k
      attn.w1v = attn.to_v
      attn.w1o = attn.to_out.0
      mlp.c_fc* = ff.linear_*
      mlp.c_proj = ff.out_projection`,
    kept:
      /^(?:t_embedder|init_x_linear|modF|cond_seq_linear|final_linear)\.|^(?:positional_encoding|register_tokens)$/,
  },
  {
    name: "HiDream-I1",
    architecture: "hidream",
    own: [[
      "caption_projection.0.linear.weight",
      "double_stream_blocks.0.block.ff_i.shared_experts.w3.weight",
    ]],
    diffusers: [],
    names: "",
    kept: /^(?:[ptx]_embedder|final_layer|caption_projection)\.|\.ff_i\.gate\.weight$/,
  },
  {
    name: "Cosmos-Predict2",
    architecture: "cosmos",
    own: [["blocks.0.mlp.layer1.weight", "blocks.0.adaln_modulation_cross_attn.1.weight"]],
    diffusers: [[
      "patch_embed.proj.weight",
      "transformer_blocks.0.norm3.linear_2.weight",
      "time_embed.norm.weight",
    ]],
    names: `
      x_embedder.proj.1 = patch_embed.proj
      t_embedder.1.linear_* = time_embed.t_embedder.linear_*
      t_embedding_norm = time_embed.norm
      final_layer.adaln_modulation.* = norm_out.linear_*
      final_layer.linear = proj_out
      [blocks.* < transformer_blocks.*]
      adaln_modulation_self_attn.* = norm1.linear_*
      adaln_modulation_cross_attn.* = norm2.linear_*
      adaln_modulation_mlp.* = norm3.linear_*
      ${
      [["self_attn", "attn1"], ["cross_attn", "attn2"]].map(([own, diffusers]) => `
      ${own}.q_proj = ${diffusers}.to_q
      ${own}.k_proj = ${diffusers}.to_k
      ${own}.v_proj = ${diffusers}.to_v
      ${own}.output_proj = ${diffusers}.to_out.0
      ${own}.q_norm = ${diffusers}.norm_q
      ${own}.k_norm = ${diffusers}.norm_k`).join("")
    }
      mlp.layer1 = ff.net.0.proj
      mlp.layer2 = ff.net.2`,
    kept: /^(?:[tx]_embedder|t_embedding_norm|pos_embedder|final_layer)\./,
  },
  {
    name: "Stable Diffusion XL",
    architecture: "sdxl",
    own: [["label_emb.0.0.weight", "input_blocks.3.0.op.weight"], [
      "add_embedding.linear_1.weight",
      "conv_in.weight",
    ]],
    diffusers: [],
    names: "",
    kept:
      /^(?:time_embed|label_emb|(?:class|time|add)_embedding|conv_in|conv_out|input_blocks\.0\.0|out\.2)\./,
  },
  {
    name: "Stable Diffusion 1 and 2",
    architecture: "sd1",
    own: [["input_blocks.3.0.op.weight"], [
      "down_blocks.0.downsamplers.0.conv.weight",
      "time_embedding.linear_1.weight",
    ]],
    diffusers: [],
    names: "",
    kept:
      /^(?:time_embed|label_emb|(?:class|time|add)_embedding|conv_in|conv_out|input_blocks\.0\.0|out\.2)\./,
  },
];
