{{/* What the service reads: its environment and the pairs file. A change of either restarts the replicas one by one. */}}

{{- define "dense-reward.environment" -}}
{{- $c := .Values.checkpoints -}}
{{- $settings := deepCopy .Values.settings -}}
{{- if and (eq $settings.engine "torch") (not .Values.requestGPU) (not $settings.threads) }}
{{- $_ := set $settings "threads" (include "dense-reward.cores" .) }}
{{- end }}
{{- range $name, $value := $settings }}
{{- if not (kindIs "invalid" $value) }}
DENSE_REWARD_{{ upper $name }}: {{ include "dense-reward.text" $value | quote }}
{{- end }}
{{- end }}
DENSE_REWARD_HOST: "0.0.0.0"
DENSE_REWARD_PORT: "8000"
{{- if ne $c.source "none" }}
DENSE_REWARD_CHECKPOINTS_FOLDER: {{ $c.mountPath | quote }}
{{- if $c.pairs }}
DENSE_REWARD_PAIRS_FILE: /etc/dense-reward/pairs/pairs.json
{{- else }}
DENSE_REWARD_SFT: {{ printf "%s/%s" $c.mountPath $c.sft | quote }}
DENSE_REWARD_REFERENCE: {{ printf "%s/%s" $c.mountPath $c.reference | quote }}
{{- end }}
{{- end }}
{{- if .Values.apiKeys.secretName }}
DENSE_REWARD_API_KEYS_FILE: {{ printf "/etc/dense-reward/keys/%s" .Values.apiKeys.secretKey | quote }}
{{- end }}
{{- if .Values.engineKey.secretName }}
DENSE_REWARD_ENGINE_KEY_FILE: {{ printf "/etc/dense-reward/engine/%s" .Values.engineKey.secretKey | quote }}
{{- end }}
{{- if .Values.tls.secretName }}
DENSE_REWARD_TLS_CERTIFICATE: /etc/dense-reward/tls/tls.crt
DENSE_REWARD_TLS_PRIVATE_KEY: /etc/dense-reward/tls/tls.key
{{- end }}
{{- end -}}

{{/* Whole cores of a replica. Without this number torch starts one thread for each core of the node. */}}
{{- define "dense-reward.cores" -}}
{{- $cpu := toString (default .Values.requestCPU .Values.limitCPU) -}}
{{- $cores := float64 (trimSuffix "m" $cpu) -}}
{{- if hasSuffix "m" $cpu -}}
{{- $cores = divf $cores 1000 -}}
{{- end -}}
{{- max 1 (floor $cores | int) -}}
{{- end -}}

{{- define "dense-reward.pairs" -}}
{{- $c := .Values.checkpoints -}}
{{- $pairs := list }}
{{- range $c.pairs }}
{{- $sft := printf "%s/%s" $c.mountPath .sft }}
{{- $reference := printf "%s/%s" $c.mountPath .reference }}
{{- $pairs = append $pairs (dict "name" .name "sft" $sft "reference" $reference) }}
{{- end }}
{{- toPrettyJson $pairs -}}
{{- end -}}
