{{/* The spec of a trainer job. Arguments of trainerSpec: root, job. */}}

{{- define "dense-reward.trainerPrefix" -}}
{{- printf "%s-train" (include "dense-reward.fullname" . | trunc 20 | trimSuffix "-") -}}
{{- end -}}

{{- define "dense-reward.trainerSpec" -}}
{{- $v := .root.Values -}}
{{- $c := $v.checkpoints -}}
{{- $asks := has .job.job (list "dpr" "gradient" "credit" "benchmark" "evaluate") -}}
{{- $hasKey := and $asks (ne $v.trainer.apiKey.secretName "") -}}
backoffLimit: {{ int $v.trainer.backoffLimit }}
{{- /* A pod that was evicted or preempted does not count towards backoffLimit. */}}
podFailurePolicy:
  rules:
    - action: Ignore
      onPodConditions:
        - type: DisruptionTarget
          status: "True"
template:
  metadata:
    labels:
      {{- include "dense-reward.selectorLabels" .root | nindent 6 }}
      app.kubernetes.io/component: trainer
  spec:
    {{- include "dense-reward.podCommon" .root | nindent 4 }}
    restartPolicy: Never
    {{- include "dense-reward.placement" .root | nindent 4 }}
    containers:
      - name: {{ .job.name | quote }}
        image: {{ include "dense-reward.trainerImage" . | quote }}
        imagePullPolicy: {{ $v.image.pullPolicy }}
        workingDir: {{ $c.mountPath | quote }}
        {{- if gt (int .job.requestGPU) 1 }}
        command: [torchrun, --standalone, "--nproc_per_node={{ int .job.requestGPU }}", -m, dense_reward_trainer.cli]
        {{- else }}
        command: [dense-reward-train]
        {{- end }}
        args:
          - {{ .job.job }}
          - {{ .job.recipe | quote }}
          - output_dir={{ $c.mountPath }}/runs/{{ .job.name }}
          {{- if $asks }}
          - service_url={{ include "dense-reward.scheme" .root }}://{{ include "dense-reward.url" .root }}
          {{- end }}
          {{- if $hasKey }}
          - {{ printf "service_key_file=/etc/dense-reward/key/%s" $v.trainer.apiKey.secretKey | quote }}
          {{- end }}
          {{- range .job.changes }}
          - {{ . | quote }}
          {{- end }}
        env:
          {{- include "dense-reward.homeEnv" .root | nindent 10 }}
          {{- include "dense-reward.givenEnv" .root | nindent 10 }}
          {{- /* In /tmp the hub's models would fill the volume, and every retry would download them again. */}}
          - name: HF_HOME
            value: {{ $c.mountPath }}/hub
          {{- include "dense-reward.hubToken" .root | nindent 10 }}
        resources:
          {{- $asked := dict "cpu" .job.requestCPU "memory" .job.requestMemory "gpu" (default 0 .job.requestGPU) }}
          {{- $given := dict "gpuType" $v.requestGPUType "limitMemory" "" }}
          {{- include "dense-reward.resources" (merge $asked $given) | nindent 10 }}
        securityContext:
          {{- include "dense-reward.containerSecurity" .root | nindent 10 }}
        volumeMounts:
          - name: tmp
            mountPath: /tmp
          - name: checkpoints
            mountPath: {{ $c.mountPath | quote }}
          {{- if gt (int .job.requestGPU) 1 }}
          - name: shm
            mountPath: /dev/shm
          {{- end }}
          {{- if $hasKey }}
          - name: key
            mountPath: /etc/dense-reward/key
            readOnly: true
          {{- end }}
          {{- include "dense-reward.caMount" .root | nindent 10 }}
          {{- include "dense-reward.extra" .root.Values.extraVolumeMounts | nindent 10 }}
    volumes:
      {{- include "dense-reward.tmpVolume" .root | nindent 6 }}
      {{- if gt (int .job.requestGPU) 1 }}
      {{- include "dense-reward.shmVolume" .root | nindent 6 }}
      {{- end }}
      {{- if $hasKey }}
      - name: key
        secret:
          secretName: {{ $v.trainer.apiKey.secretName | quote }}
          defaultMode: 0440
      {{- end }}
      {{- include "dense-reward.caVolume" .root | nindent 6 }}
      {{- include "dense-reward.extra" .root.Values.extraVolumes | nindent 6 }}
      {{- include "dense-reward.checkpointsVolume" .root | nindent 6 }}
{{- end -}}
